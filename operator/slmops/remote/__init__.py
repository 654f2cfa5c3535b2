"""The only importer of `httpx`: reads workers' progress, Prometheus and the routers' agents."""
