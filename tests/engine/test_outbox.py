"""Outputs reach their readers in order, whoever sends them."""

import asyncio
from threading import Thread

from server.engine.mailbox import Mailbox
from server.engine.outbox import Outbox
from server.engine.request import RequestOutput


def output(request_id: str, num: int) -> RequestOutput:
    return RequestOutput(request_id, num_output_tokens=num)


def test_what_was_held_goes_out_before_what_came_after() -> None:
    async def scenario() -> list[int]:
        outbox = Outbox()
        mailbox = outbox.mailboxes["x"] = Mailbox(asyncio.get_running_loop())
        outbox.hold([output("x", 1), output("gone", 7)])
        outbox.hold([output("x", 2)])
        await asyncio.sleep(0)
        assert len(mailbox) == 0
        assert outbox.num_held == 3
        outbox.deliver([output("x", 3)])
        assert outbox.num_held == 0
        return [(await mailbox.get()).num_output_tokens for _ in range(3)]

    assert asyncio.run(scenario()) == [1, 2, 3]


class Collecting(Mailbox):
    """Keeps what it is given as it comes."""

    def __init__(self) -> None:
        super().__init__(asyncio.get_running_loop())
        self.given: list[int] = []

    def put(self, output: RequestOutput) -> None:
        self.given.append(output.num_output_tokens)


def test_threads_that_deliver_at_once_send_each_output_once() -> None:
    num_outputs = 5000

    async def scenario() -> list[int]:
        outbox, mailbox = Outbox(), Collecting()
        outbox.mailboxes["x"] = mailbox
        outbox.hold(output("x", index) for index in range(num_outputs))
        threads = [Thread(target=outbox.deliver) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        await asyncio.sleep(0)
        return mailbox.given

    assert sorted(asyncio.run(scenario())) == list(range(num_outputs))
