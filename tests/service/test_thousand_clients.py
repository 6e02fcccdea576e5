"""1,000 clients at once on a real server: each gets the answer to its own picture or a 429, and the counts agree."""

import asyncio
import random
import re
from collections import Counter

import httpx
from service_fakes import COLOURS, encoded, picture
from service_process import ServerProcess, server_process

CLIENTS = 1000
TURNS = 1
SIZES = [(96, 64), (64, 96), (160, 96), (224, 160)]
_LONGEST_WAIT_S = 0.5  # of a client after 429: the test checks that it may come back, and need not wait as told


async def client_of(number: int, http: httpx.AsyncClient, statuses: Counter) -> None:
    chance = random.Random(number)
    for turn in range(TURNS):
        size = chance.choice(SIZES)
        x, y = chance.randrange(0, size[0] - 24), chance.randrange(0, size[1] - 20)
        width, height = chance.randrange(8, 24), chance.randrange(8, 20)
        label = chance.randrange(2)
        data = encoded(picture((x, y, x + width, y + height), size=size, colour=COLOURS[label]))
        headers = {"Content-Type": "image/png", "X-Request-Id": f"{number}.{turn}"}
        while True:
            response = await http.post("/segment", content=data, headers=headers)
            statuses[response.status_code] += 1
            assert response.headers["x-request-id"] == f"{number}.{turn}"
            if response.status_code != 429:
                break
            assert response.json()["reason"] == "queue_full" and 1 <= int(response.headers["retry-after"]) <= 60
            await asyncio.sleep(chance.random() * _LONGEST_WAIT_S)
        assert response.status_code == 200, response.text
        document = response.json()
        assert (document["images"][0]["width"], document["images"][0]["height"]) == size
        (found,) = document["annotations"]
        assert found["bbox"] == [x, y, width, height] and found["category_id"] == (7, 90)[label]


async def all_clients(url: str, statuses: Counter) -> None:
    # The server closes what is idle for 5 s; httpx uses it for as long, and may send just as it is closed.
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(client_of(number, http, statuses))


def counted(server: ServerProcess) -> Counter:
    """Requests to /segment by status, as the server has them."""
    found: Counter = Counter()
    for name, value in server.metrics().items():
        match = re.fullmatch(r'dsg_request_duration_seconds_count\{.*route="/segment".*status="(\d+)"\}', name)
        if match:
            found[int(match[1])] = int(value)
    return found


def test_a_thousand_clients_at_once() -> None:
    statuses: Counter = Counter()
    with server_process(max_queue=256) as server:
        asyncio.run(all_clients(server.url, statuses))
        assert set(statuses) <= {200, 429} and statuses[200] == CLIENTS * TURNS
        assert counted(server) == statuses
        metrics = server.metrics()
        assert metrics["dsg_batch_size_sum"] == statuses[200]
        assert sum(v for name, v in metrics.items() if name.startswith("dsg_batched_pictures_total")) == statuses[200]
        assert sum(v for k, v in metrics.items() if k.startswith("dsg_rejected_requests_total")) == statuses[429]
        for name in ("dsg_accepted_pictures", "dsg_in_flight_pixels", "dsg_in_flight_bytes", "dsg_queued_pictures"):
            assert metrics[name] == 0, name
        # The loop was asked ten times a second how late it was.
        assert metrics["dsg_event_loop_lag_seconds_count"] > 0
