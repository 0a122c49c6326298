"""A ComfyUI that computes nothing and starts at once: queue, history, files and events as the real one's.

A prompt's text says what becomes of it: `kill` ends the process as the kernel would, `wait NAME` says in
the folder of the variable GATES that it waits, and ends when there is a file NAME in it. All others end at once. The
picture is made of what was asked for, so that equal rows give equal pictures.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from aiohttp import web

KNOWN = json.loads((Path(__file__).parent / "known.json").read_text(encoding="utf-8"))


class ComfyUI:
    def __init__(self, output: Path):
        self.output, self.queue, self.history, self.sockets = output, asyncio.Queue(), {}, {}
        self.gates = Path(os.environ.get("GATES", "."))

    async def socket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        async for _ in socket:
            pass
        return socket

    async def prompt(self, request):
        body = await request.json()
        await self.queue.put(body)
        return web.json_response({"prompt_id": body["prompt_id"], "node_errors": {}})

    async def nothing(self, _):
        return web.json_response({"queue_pending": [], "queue_running": []})

    async def known(self, _):
        return web.json_response(KNOWN)

    async def past(self, request):
        number = request.match_info["id"]
        return web.json_response({number: self.history[number]} if number in self.history else {})

    async def view(self, request):
        return web.FileResponse(self.output / request.query["filename"])

    async def work(self):
        self.output.mkdir(parents=True, exist_ok=True)
        while True:
            body = await self.queue.get()
            text = body["prompt"]["2"]["inputs"]["text"]
            await self.tell(body, "execution_start")
            if text == "kill":
                await asyncio.sleep(0.5)  # a moment later, as models are loaded
                os.kill(os.getpid(), signal.SIGKILL)
            if text.startswith("wait "):
                (self.gates / f"{text}.waits").touch()
                while not (self.gates / text.split()[1]).exists():
                    await asyncio.sleep(0.01)
            inputs = json.dumps({node: each["inputs"] for node, each in body["prompt"].items()}, sort_keys=True)
            name = f"{body['prompt']['7']['inputs']['filename_prefix']}_00001_.png"
            (self.output / name).write_text(hashlib.sha256(inputs.encode()).hexdigest())
            outputs = {"7": {"images": [{"filename": name, "subfolder": "", "type": "output"}]}}
            self.history[body["prompt_id"]] = {"status": {"messages": []}, "outputs": outputs}
            await self.tell(body, "execution_success")
            await self.tell(body, "executing", node=None)

    async def tell(self, body, kind, **data):
        event = {"type": kind, "data": {"prompt_id": body["prompt_id"], **data}}
        await self.sockets[body["client_id"]].send_str(json.dumps(event))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--output-directory", type=Path)
    parser.add_argument("--fail")
    options, _ = parser.parse_known_args()
    if options.fail:
        sys.stdout.write(f"{options.fail}\n")
        sys.exit(3)
    comfyui, app = ComfyUI(options.output_directory), web.Application()
    for path, answer in (("/ws", comfyui.socket), ("/object_info", comfyui.known), ("/history/{id}", comfyui.past),
                         ("/queue", comfyui.nothing), ("/view", comfyui.view)):  # fmt: skip
        app.router.add_get(path, answer)
    for path, answer in (("/prompt", comfyui.prompt), ("/queue", comfyui.nothing), ("/interrupt", comfyui.nothing)):
        app.router.add_post(path, answer)

    async def begin(app):
        app["work"] = asyncio.create_task(comfyui.work())

    app.on_startup.append(begin)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
