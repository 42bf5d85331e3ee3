"""Adds packets in the network: one rule, for a switch in user space, in the kernel, and in a simulator."""
