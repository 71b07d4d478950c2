"""Renders the report as one HTML page, with its plots."""
