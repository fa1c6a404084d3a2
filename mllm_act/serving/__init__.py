"""A policy as a server: openpi's websocket protocol, many clients at once, every client's history apart."""
