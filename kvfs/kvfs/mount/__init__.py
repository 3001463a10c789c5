"""The mount: one ``Filesystem`` with all semantics, thin front ends over it, and the program that
mounts, serves and unmounts."""
