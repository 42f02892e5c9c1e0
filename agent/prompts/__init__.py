"""Prompts and task texts: versioned data files, read by ``agent.prompting``. A file is never changed once a
trial has used it; a new wording is a new file.
"""
