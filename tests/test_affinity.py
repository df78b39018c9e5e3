"""The order in which replicas are tried, by what they hold and how busy they are. Ray's router asks here."""

from dataclasses import dataclass, field
from typing import NamedTuple

from server.affinity import in_order


class Name(NamedTuple):
    unique_id: str


@dataclass(frozen=True)
class Holder:
    replica_id: Name
    num_ongoing: int = 0
    routing_stats: dict[str, list[str]] = field(default_factory=dict)


def order(name: str, *holders: Holder) -> list[list[str]]:
    ranks = in_order(name, holders, lambda holder: holder.num_ongoing, max_imbalance=2)
    return [[holder.replica_id.unique_id for holder in rank] for rank in ranks if rank]


def test_who_holds_it_nearest_comes_first_and_who_is_much_busier_last() -> None:
    device, host = {"device": ["a"], "host": ["a"]}, {"device": [], "host": ["a"]}
    holders = [
        Holder(Name("x")),
        Holder(Name("h"), 2, host),
        Holder(Name("d"), 2, device),
        Holder(Name("full"), 3, device),
    ]
    assert order("a", *holders) == [["d"], ["h"], ["x"], ["full"]]


def test_without_one_of_them_only_its_own_names_go_elsewhere() -> None:
    holders = [Holder(Name(name)) for name in "uvwxyz"]
    orders = {name: order(name, *holders) for name in map(str, range(40))}
    assert {ranks[0][0] for ranks in orders.values()} == set("uvwxyz")
    for name, ranks in orders.items():
        assert order(name, *holders[1:]) == [rank for rank in ranks if rank != ["u"]]
