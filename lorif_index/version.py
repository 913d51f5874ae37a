"""Version of the library; the format of indexes has its own, in `manifest`."""

VERSION = "0.1.0"
