"""HTTP: names, status codes, who may. What they do is in the modules above."""

from fastapi import APIRouter
from fastapi.routing import APIRoute

from fedmkt_coordinator.routes import (
    adapters,
    artifacts,
    audit,
    chunks,
    events,
    federations,
    jobs,
    metrics,
    operations,
    rounds,
    sites,
    uploads,
    webhooks,
)


def routers() -> list[APIRouter]:
    return [
        chunks.router,  # the framework looks for a route from the first on, and this one is asked for most
        operations.router,
        metrics.router,
        federations.router,
        sites.router,
        rounds.router,
        adapters.router,
        events.router,
        webhooks.router,
        uploads.router,
        artifacts.router,
        jobs.router,
        audit.router,
    ]


def methods_of(path: str) -> set[str]:
    """What may be done at this address."""
    routes = [route for router in routers() for route in router.routes if isinstance(route, APIRoute)]
    return {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
