"""The HTTP application: routes, schemas, content negotiation, documentation."""
