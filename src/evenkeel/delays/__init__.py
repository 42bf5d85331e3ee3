"""How late things are: laws of task times, their text, and real faults."""
