"""What the coordinator is measured beside: servers that do the same work with nothing around it.

    python load_contenders.py ingest FOLDER   PUT /<upload>/<chunk>: hashes the body, writes it to a file of its own;
                                              POST /<upload>: fsyncs the files of the upload
    python load_contenders.py endpoint        GET /status: a FastAPI endpoint that answers 304 to an If-None-Match

Both run in uvicorn with its defaults, as the coordinator does. The first line on standard output is the port.
"""

import asyncio
import hashlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

ETAG = '"0123456789abcdef"'


def ingest(folder: Path) -> Any:
    """A bare ASGI application. Hashing, writing and synchronising leave the event loop, one hop to a thread each."""

    def keep(data: bytes, path: Path) -> bytes:
        path.write_bytes(data)
        return hashlib.sha256(data).hexdigest().encode()

    def synchronise(upload: str) -> None:
        for path in folder.glob(f"{upload}.*"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        _, upload, *number = scope["path"].split("/")
        pieces = []
        while True:
            message = await receive()
            pieces.append(message["body"])
            if not message.get("more_body"):
                break
        headers = []
        if scope["method"] == "PUT":
            path = folder / f"{upload}.{number[0]}"
            headers = [(b"etag", await asyncio.to_thread(keep, b"".join(pieces), path))]
        else:
            await asyncio.to_thread(synchronise, upload)
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    return app


def endpoint() -> FastAPI:
    app = FastAPI()

    @app.get("/status")
    async def status(request: Request) -> Response:
        headers = {"ETag": ETAG, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == ETAG:
            return Response(status_code=304, headers=headers)
        return Response(b"{}", media_type="application/json", headers=headers)

    return app


def main() -> None:
    app = ingest(Path(sys.argv[2])) if sys.argv[1] == "ingest" else endpoint()
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", server_header=False)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
