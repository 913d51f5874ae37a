"""Answers in the browser: one page to send, and an explorer on loopback."""
