"""`kvfs up`: starts the roles of one machine as processes, keeps them running, stops them in order.

A supervisor talks to the operating system directly: it is the program around the services, not one
of them.
"""
