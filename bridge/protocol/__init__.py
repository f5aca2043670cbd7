"""What both sides must agree on, as pure data and pure functions.

Nothing here imports torch, opens a socket, reads a clock or the environment, so every rule in this
room can be tested in microseconds and read without knowing how bytes travel.
"""
