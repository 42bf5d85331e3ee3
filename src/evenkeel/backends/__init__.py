"""Does tasks: worker processes, remote servers, fakes."""
