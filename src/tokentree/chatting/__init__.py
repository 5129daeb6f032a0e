"""Chats in a terminal."""
