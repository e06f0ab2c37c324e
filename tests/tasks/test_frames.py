"""Messages of many writers on one pipe arrive whole, in each writer's order."""

import os
import threading

from tasks.frames import FrameReader, FrameWriter


def test_long_messages_of_many_writers_arrive_whole_and_in_order() -> None:
    reading, writing = os.pipe()
    n_writers, n_messages = 4, 30

    def write(number: int) -> None:
        writer = FrameWriter(writing, str(number))
        for count in range(n_messages):
            writer.send(count=count, text=f"{number}.+\n" * 3000, rank=number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(n_writers)]
    for thread in threads:
        thread.start()
    reader, seen = FrameReader(), []
    while len(seen) < n_writers * n_messages:
        seen += reader.feed(os.read(reading, 5000))
    for thread in threads:
        thread.join()
    os.close(writing)
    os.close(reading)
    for number in range(n_writers):
        mine = [message for sender, message in seen if sender == str(number)]
        assert [message["count"] for message in mine] == list(range(n_messages))
        assert all(message["text"] == f"{number}.+\n" * 3000 for message in mine)


def test_prints_between_messages_are_told_apart() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"a warning. of a library + more\n")
    FrameWriter(writing, "agent").send(port=7)
    os.write(writing, b"\x1eno frame\n")
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        seen = FrameReader().feed(stream.read())
    assert seen == [
        ("", {"print": "a warning. of a library + more"}),
        ("agent", {"port": 7}),
        ("", {"print": "\x1eno frame"}),
    ]
