"""The tiny model and documents of the search."""

from support.search_fixtures import documents, model, shared_model  # noqa: F401
