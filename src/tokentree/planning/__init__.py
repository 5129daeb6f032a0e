"""What a server does under a load: the scheduler and the loop themselves, on a clock that is a simulation's."""
