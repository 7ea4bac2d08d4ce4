import socket

import pytest

from ldm.errors import InputError
from ldm.web.address import free_port, own_names


@pytest.mark.parametrize("host", ["999.1.1.1", "192.0.2.77", "no such name", "a" * 300, "\x00"])
def test_a_wrong_host_is_one_line(host):
    with pytest.raises(InputError, match="--host") as error:
        free_port(host, None)
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_named_and_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: in use"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert 7860 <= free_port("localhost", None) < 7960


def test_names_of_this_machine():
    assert set(own_names("127.0.0.1", ["x.example"])) >= {"localhost", "x.example"}
    assert socket.gethostname() not in own_names("127.0.0.1", []) or (
        socket.gethostname() == "localhost"
    )
    assert {socket.gethostname(), "localhost"} <= set(own_names("0.0.0.0", []))
