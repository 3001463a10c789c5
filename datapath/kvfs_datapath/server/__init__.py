"""The chunk server: listeners, connections, the targets it has, heartbeats, scrubbing."""
