"""A chunk server as a member of chains of several copies: updates, blocks in one pass, coming back
in step, repair, garbage (docs/design/0004-chains.md)."""
