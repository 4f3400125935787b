"""Is it alive, is it ready, what is it."""

from fastapi import APIRouter, Request, Response

from fedmkt import __version__
from fedmkt.protocol import PROTOCOL_VERSION, Health, KeysView, ProblemList, Version
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.dependencies import NEEDED
from fedmkt_coordinator.security import Anyone, Stranger

router = APIRouter(tags=["operations"])


@router.get("/healthz", dependencies=[Anyone], summary="The process answers")
async def health() -> Health:
    """Nothing else is asked: for what it needs, see /readyz."""
    return Health(status="ok")


@router.get(
    "/readyz", dependencies=[Stranger], summary="What it needs answers, too", responses={503: {"model": Health}}
)
async def ready(context: Ctx, response: Response) -> Health:
    """503 when the database or the artifact store fails. Without Redis requests still work, and jobs wait.

    What fails is named in `checks`, with what to do. The answer may be a second old.
    """
    checks = await context.dependencies.check()
    down = any(not checks[name].ok for name in NEEDED)
    if down:
        response.status_code = 503
    answers = {name: check.answer for name, check in checks.items()}
    return Health(status="unavailable" if down else "ok", checks=answers)


@router.get("/version", dependencies=[Anyone], summary="Versions of the program and of the protocol")
async def version() -> Version:
    """The handshake: a program compares `protocol_version` with its own, which it sends as FedMKT-Protocol."""
    return Version(version=__version__, protocol_version=PROTOCOL_VERSION)


@router.get("/v1/keys", dependencies=[Anyone], summary="Keys that sign receipts")
async def keys(context: Ctx) -> KeysView:
    """A receipt was signed by one of them; the present one comes first."""
    return KeysView(public_keys=(context.key.public_hex,))


@router.get("/v1/problems", dependencies=[Anyone], summary="Every problem code, and what to do")
def problem_codes(request: Request) -> ProblemList:
    """What `code` can say in an answer of 400 and above, whichever call it answers."""
    made: ProblemList = request.app.state.problem_list()
    return made
