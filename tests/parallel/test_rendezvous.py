"""The store where ranks meet: known before it listens, apart by epoch, outside the ranks."""

import pytest

from parallel.rendezvous import StoreServer, connect


def test_clients_meet_by_epoch_and_outlive_each_other() -> None:
    server = StoreServer("127.0.0.1")
    first = connect(server.address, 7, timeout_s=30)
    first.set("rank0", "here")
    del first
    assert connect(server.address, 7, timeout_s=30).get("rank0") == b"here"
    late = connect(server.address, 8, timeout_s=0.2)
    with pytest.raises(RuntimeError):
        late.get("rank0")
