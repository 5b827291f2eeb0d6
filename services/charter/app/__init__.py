"""Puts the services together: `charter run` for one, several or all of them, and `charter chat`.

The only folder, besides cli.py, that knows more than one service. It decides addresses, the order of start
and stop, and what the terminal shows; what a service does is in the service's own folder.
"""
