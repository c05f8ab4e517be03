"""Serves a model and its adapters over HTTP."""
