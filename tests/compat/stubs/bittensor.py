"""As much of bittensor as the subnet's miner and its validator's functions touch, without a chain."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pydantic


class Synapse(pydantic.BaseModel):
    """What is sent; the subnet adds the fields."""

    dendrite: Any = None


class Config(dict):
    """Nested settings by attribute, also by a dotted name; None where there is none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        first, _, rest = name.partition(".")
        value = self.get(first)
        return getattr(value, rest) if rest and value is not None else value

    def __setattr__(self, name: str, value: Any) -> None:
        first, _, rest = name.partition(".")
        if rest:
            setattr(self.setdefault(first, Config()), rest, value)
        else:
            self[first] = value

    def merge(self, other: Config) -> None:
        """Take over what another one has."""
        for name, value in other.items():
            if isinstance(value, Config) and isinstance(self.get(name), Config):
                self[name].merge(value)
            else:
                self[name] = value


def config(parser: argparse.ArgumentParser) -> Config:
    """The command line as settings."""
    found = Config()
    for name, value in vars(parser.parse_known_args()[0]).items():
        setattr(found, name, value)
    return found


class Logging:
    """Prints warnings and errors; the rest goes nowhere."""

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--logging.logging_dir", default="logs")

    @staticmethod
    def error(*texts: object) -> None:
        print("error:", *texts, flush=True)

    warning = exception = error

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


logging = Logging()
HOTKEY = "5Miner"


class wallet:  # noqa: N801
    """A name and no keys."""

    def __init__(self, config: Config | None = None) -> None:
        self.hotkey = SimpleNamespace(ss58_address=HOTKEY)

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--wallet.name", default="default")
        parser.add_argument("--wallet.hotkey", default="default")


class metagraph:  # noqa: N801
    """A subnet of one validator and this miner."""

    def __init__(self, *_: object, **__: object) -> None:
        self.hotkeys = ["5Validator", HOTKEY]
        self.axons = [SimpleNamespace(ip="127.0.0.1", hotkey=name) for name in self.hotkeys]
        self.validator_permit = [True, False]
        self.S, self.last_update = [40_000.0, 0.0], [0, 0]

    def sync(self, **_: object) -> None:
        """Nothing changes."""


class subtensor:  # noqa: N801
    """A chain that stands still."""

    chain_endpoint = "nowhere"

    def __init__(self, config: Config | None = None) -> None:
        pass

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--subtensor.chain_endpoint", default="nowhere")

    def metagraph(self, _: int) -> metagraph:
        return metagraph()

    def is_hotkey_registered(self, **_: object) -> bool:
        return True

    def get_current_block(self) -> int:
        return 1


class axon:  # noqa: N801
    """Keeps what is attached to it."""

    def __init__(self, wallet: object = None, config: Config | None = None) -> None:
        self.attached: dict[str, Any] = {}
        self.started = False

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--axon.port", type=int, default=8091)

    def attach(self, **functions: Any) -> None:
        self.attached = functions

    def serve(self, **_: object) -> None:
        pass

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.started = False


# Base classes of the subnet's mocks, which nothing here makes.
class dendrite:  # noqa: N801
    """Unused."""


class MockSubtensor:
    """Unused."""


class MockWallet:
    """Unused."""
