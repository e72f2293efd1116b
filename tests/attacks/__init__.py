"""Hostile and broken inputs. Each file makes one model folder in `make(folder)` and names the error it must end in.

ERROR: the kind; SAYS: words of the message. The folder is valid but for the one thing that the file's name says.
"""
