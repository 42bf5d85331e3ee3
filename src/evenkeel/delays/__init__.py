"""Makes things late: laws of task times, their text, and real faults."""
