"""HTTP: names, status codes, who may. What they do is in the modules above."""

from fastapi import APIRouter

from fedmkt_coordinator.routes import artifacts, events, federations, jobs, operations, rounds, sites, uploads


def routers() -> list[APIRouter]:
    return [
        operations.router,
        federations.router,
        sites.router,
        rounds.router,
        events.router,
        uploads.router,
        artifacts.router,
        jobs.router,
    ]
