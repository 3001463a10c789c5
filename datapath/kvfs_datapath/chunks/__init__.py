"""One target: chunks as files in a directory, their attributes, versions, locks. No network."""
