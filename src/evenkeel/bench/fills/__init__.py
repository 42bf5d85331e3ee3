"""Runs `evenkeel bench fills`: measures how good answers from backups are."""
