"""The accompanist as a service: a queue of songs on disk, workers, a REST interface and a page."""
