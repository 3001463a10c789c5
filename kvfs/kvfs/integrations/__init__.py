"""Adapters between kvfs and inference engines. Each imports its engine inside, none is imported by
``import kvfs``."""
