"""/v1/responses: another form of chats."""
