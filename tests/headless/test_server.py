"""A server's ways to go wrong, played by a small one: it hangs, breaks off, refuses, runs out of memory or disk."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from dit_toolkit.headless.errors import DiskFull, JobFailed, OutOfMemory, WorkerLost
from dit_toolkit.headless.plan import Job
from dit_toolkit.headless.server import Server, saved
from dit_toolkit.tests.headless.world import prompt

JOB = Job(0, "red", prompt(), ())


class Played:
    """Speaks as ComfyUI does. `script`: the events after a prompt; `messages`: how its history says it ended."""

    def __init__(self, script=(), messages=(), refuse=None, others=0):
        self.script, self.messages, self.refuse, self.others = script, list(messages), refuse, others
        self.asked: list[str] = []
        self.queued = ""

    async def socket(self, request):
        self.ws = web.WebSocketResponse()
        await self.ws.prepare(request)
        async for _ in self.ws:
            pass
        return self.ws

    async def take(self, request):
        body = await request.json()
        self.asked.append(request.path)
        if request.path != "/prompt":
            return web.json_response({})
        if self.refuse:
            return web.json_response(self.refuse, status=400)
        self.queued = body["prompt_id"]
        self.talk = asyncio.create_task(self.speak(body["prompt_id"]))
        return web.json_response({"prompt_id": body["prompt_id"], "node_errors": {}})

    async def speak(self, prompt_id):
        for event in self.script:
            if event == "close":
                await self.ws.close()
            elif isinstance(event, float):
                await asyncio.sleep(event)
            else:
                kind, data = event
                await self.ws.send_str(json.dumps({"type": kind, "data": {"prompt_id": prompt_id, **data}}))

    async def history(self, request):
        outputs = {"7": {"images": [{"filename": "red_00001_.png", "subfolder": "", "type": "output"}]}}
        return web.json_response({self.queued: {"status": {"messages": self.messages}, "outputs": outputs}})

    async def queue(self, request):
        return web.json_response({"queue_pending": [[0, self.queued]] if self.others else [], "queue_running": []})

    async def view(self, request):
        return web.Response(body=b"picture")


@asynccontextmanager
async def connected(played, patience):
    app = web.Application()
    app.router.add_get("/ws", played.socket)
    app.router.add_get("/history/{id}", played.history)
    app.router.add_get("/queue", played.queue)
    app.router.add_get("/view", played.view)
    for path in ("/prompt", "/queue", "/interrupt", "/free"):
        app.router.add_post(path, played.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server = Server(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", patience)
    try:
        await server.connect()
        yield server
    finally:
        await server.close()
        await runner.cleanup()


def run(played, patience=60.0):
    async def once():
        async with connected(played, patience) as server:
            return await server.run(JOB)

    return asyncio.run(asyncio.wait_for(once(), 50))


START, END = ("execution_start", {}), ("executing", {"node": None})
CACHED = ("execution_cached", {"nodes": ["1", "2", "no node of ours"]})


def failed(text, kind="ValueError"):
    return [
        ["execution_error", {"node_id": "6", "node_type": "Sampler", "exception_type": kind, "exception_message": text}]
    ]


def test_a_job_gives_its_files_and_what_was_spared():
    outcome = run(Played([START, CACHED, ("execution_success", {}), END]))
    assert outcome.files == (("red_00001_.png", b"picture"),)
    assert (outcome.nodes, outcome.reused) == (len(JOB.prompt), 2)
    assert outcome.seconds > 0


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        (failed("the size\n is odd\n"), JobFailed, "^KSampler: the size is odd$"),
        (failed("Allocation on device 0"), OutOfMemory, "memory"),
        (failed("no", "torch.OutOfMemoryError"), OutOfMemory, "memory"),
        (failed("[Errno 28] No space left on device: '/x'", "OSError"), DiskFull, None),
        ([["execution_interrupted", {}]], WorkerLost, "interrupted"),
    ],
)
def test_what_comfyui_says_tells_a_jobs_fault_from_a_workers(messages, error, words):
    played = Played([START, END], messages)
    with pytest.raises(error, match=words):
        run(played)
    assert ("/free" in played.asked) == (error is OutOfMemory)


def test_a_prompt_that_is_refused_fails_with_the_nodes_words():
    refuse = {
        "error": {"message": "Prompt outputs failed validation"},
        "node_errors": {"6": {"errors": [{"message": "Value not in list", "details": "sampler: 'x'"}]}},
    }
    with pytest.raises(JobFailed, match=r"^KSampler: Value not in list \(sampler: 'x'\)$"):
        run(Played(refuse=refuse))


@pytest.mark.parametrize(
    "noise", [(), [event for _ in range(40) for event in (("monitor", {"prompt_id": None}), 0.05)]]
)
def test_a_server_that_says_nothing_of_our_job_hangs(noise):
    """Whatever else it says: packs that watch the machine speak all the time."""
    with pytest.raises(WorkerLost, match=r"said nothing for 0\.5 s") as caught:
        run(Played([START, *noise]), patience=0.5)
    assert caught.value.started


def test_a_job_that_waits_behind_those_of_others_does_not_hang():
    assert run(Played([1.2, START, END], others=1), patience=0.3).files


def test_a_connection_that_breaks_is_a_lost_worker():
    with pytest.raises(WorkerLost, match="closed the connection") as caught:
        run(Played([START, "close"]))
    assert caught.value.started
    with pytest.raises(WorkerLost) as caught:
        run(Played(["close"]))
    assert not caught.value.started


def test_a_job_that_had_ended_when_the_connection_broke_was_not_at_fault():
    """Its pictures are lost, and it is done again. It does not count as a try."""
    with pytest.raises(WorkerLost) as caught:
        run(Played([START, ("execution_success", {}), "close"]))
    assert not caught.value.started


def test_a_server_that_is_not_there_is_a_lost_worker():
    with pytest.raises(WorkerLost, match="does not answer"):
        asyncio.run(Server("http://127.0.0.1:9", 60).connect())


def test_a_job_that_is_called_off_is_taken_from_the_server_also_when_it_is_called_off_twice():
    async def call_off(played):
        async with connected(played, 60) as server:
            job = asyncio.create_task(server.run(JOB))
            while not played.queued:
                await asyncio.sleep(0)
            for _ in range(2):
                job.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(job, return_exceptions=True)

    played = Played([START])
    asyncio.run(call_off(played))
    assert played.asked[-2:] == ["/queue", "/interrupt"]


def test_saved_files_come_before_shown_ones():
    shown, kept = {"filename": "a.png", "type": "temp"}, {"filename": "b.webm", "type": "output"}
    assert saved({"1": {"images": [shown], "animated": [True]}, "2": {"gifs": [kept], "text": ["a"]}}) == [kept]
    assert saved({"1": {"images": [shown]}}) == [shown]
    assert saved({"1": {"images": [kept]}, "2": {"images": [kept]}}) == [kept]
