"""Talking to providers: one module opens sockets, the others are pure."""
