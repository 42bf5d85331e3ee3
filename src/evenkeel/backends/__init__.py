"""Who does a task: worker processes, remote servers, fakes."""
