"""Fakes that tests and demonstrations without virtual machines share."""
