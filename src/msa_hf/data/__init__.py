"""Readers of users' documents."""
