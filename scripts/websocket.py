"""A websocket for code that is not asynchronous, on the aiohttp that ComfyUI brings."""

from __future__ import annotations

import asyncio

import aiohttp


class WebSocket:
    """One connection. Messages wait until `receive` asks for them."""

    def __init__(self, url: str, timeout: float = 30):
        self._loop = asyncio.new_event_loop()
        self._session, self._socket = self._loop.run_until_complete(asyncio.wait_for(_connect(url), timeout))

    def send(self, text: str) -> None:
        self._loop.run_until_complete(self._socket.send_str(text))

    def receive(self, timeout: float) -> str | bytes | None:
        """The next message, or None after `timeout` seconds without one. Raises ConnectionError once closed."""
        try:
            message = self._loop.run_until_complete(self._socket.receive(timeout))
        except asyncio.TimeoutError:
            return None
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            return message.data
        raise ConnectionError(f"the other side closed the websocket ({message.type.name.lower()})")

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


async def _connect(url: str) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    try:
        return session, await session.ws_connect(url, max_msg_size=0)  # screenshots and previews have no useful bound
    except BaseException:
        await session.close()
        raise
