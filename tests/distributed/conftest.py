"""The tiny model and documents of the search, and jobs of many ranks that search with them."""

from support.search_fixtures import alone, documents, model, ranks, shared_model  # noqa: F401
