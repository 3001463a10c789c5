"""The chunk client: batches of blocks and striped files, from and to chunk servers."""
