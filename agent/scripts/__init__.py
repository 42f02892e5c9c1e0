"""Controls: scripted brains whose true score is known beforehand.

They are instrument checks. A control tests the laboratory (cell, capture, probes, scorer), never a model, and
its trials are labelled so. Each module has one function ``script(task, system)``, a generator that yields a
:class:`~agent.thinking.Thought` and is sent the :class:`~agent.terminals.Result` of its action. To add a
control, add a module; its file name is its name.
"""
