# SPDX-License-Identifier: Apache-2.0
import pyarrow as pa
import pytest

from dataengine import records
from dataengine.flow import StageError, apply_stage, settle, source_table
from dataengine.stage import Drop, Kept, Stage, provenance


class Split(Stage):
    """Gives as many clips as the source's name has letters after the slash; z is dropped."""

    name = "split"
    inputs = ("_video",)
    outputs = pa.schema(
        [
            ("video_id", pa.string()),
            ("clip_id", pa.string()),
            ("start_ms", pa.int64()),
            ("end_ms", pa.int64()),
            ("duration_ms", pa.int64()),
        ]
    )

    def process(self, batch):
        return [self._one(row["_video"]["source"].strip("/")) for row in batch]

    def _one(self, name):
        if name.startswith("z"):
            return Drop("bad", "starts with z", retryable=name == "zz")
        spans = [(1000 * i, 1000 * i + 1000) for i in range(len(name))]
        return Kept(
            tuple(
                {
                    "video_id": name,
                    "clip_id": records.clip_id(name, a, b),
                    "start_ms": a,
                    "end_ms": b,
                    "duration_ms": b - a,
                    **({"_drop": {"stage": "split", "reason": "odd"}} if i == 3 else {}),
                }
                for i, (a, b) in enumerate(spans)
            )
        )


class Caption(Stage):
    name = "caption"
    inputs = ("clip_id",)
    outputs = pa.schema([("caption", pa.string())])

    def process(self, batch):
        return [
            Drop("mute", row["clip_id"])
            if row["clip_id"].startswith("b")
            else Kept(
                (
                    {
                        "caption": row["clip_id"].upper(),
                        "provenance": [provenance("caption", "upper")],
                    },
                )
            )
            for row in batch
        ]


def flow(names):
    todo = [
        {
            "source": f"/{n}",
            "source_version": "",
            "file_bytes": 1,
            "attempts": None,
            "refusal": None,
            "spans": None,
        }
        for n in names
    ]
    table = source_table(todo)
    for stage in (Split(Split.Config()), Caption(Caption.Config())):
        table = apply_stage(stage, table, stage.process)
    return table


def test_rows_fan_out_in_order_and_dropped_ones_stay():
    table = flow(("aa", "zz", "c", "b", "dddd"))
    assert table["clip_id"].to_pylist() == [
        "aa_0_1000", "aa_1000_2000", None, "c_0_1000", "b_0_1000",
        "dddd_0_1000", "dddd_1000_2000", "dddd_2000_3000", "dddd_3000_4000",
    ]  # fmt: skip
    assert table["caption"].to_pylist()[:4] == ["AA_0_1000", "AA_1000_2000", None, "C_0_1000"]
    reasons = [drop and drop["reason"] for drop in table["_drop"].to_pylist()]
    assert reasons == [None, None, "bad", None, "mute", None, None, None, "odd"]


def test_settling_counts_every_video_and_every_clip():
    clips, videos = settle(flow(("aa", "zz", "z", "b", "dddd")), max_attempts=3)
    assert clips.schema.equals(records.CLIP_SCHEMA)
    assert clips["clip_id"].to_pylist() == [
        "aa_0_1000", "aa_1000_2000", "dddd_0_1000", "dddd_1000_2000", "dddd_2000_3000",
    ]  # fmt: skip
    ends = {v["source"]: (v["status"], v["reason"], v["num_clips"], v["clips_ms"]) for v in videos}
    assert ends == {
        "/aa": ("kept", None, 2, 2000),
        "/zz": ("failed", "bad", 0, 0),
        "/z": ("dropped", "bad", 0, 0),
        "/b": ("dropped", "all_clips_dropped", 0, 0),
        "/dddd": ("kept", None, 3, 3000),
    }
    lost = {v["source"]: v["dropped_clips"] for v in videos}
    assert lost["/b"] == [
        {"stage": "caption", "reason": "mute", "num_clips": 1, "duration_ms": 1000}
    ]
    assert lost["/dddd"] == [
        {"stage": "split", "reason": "odd", "num_clips": 1, "duration_ms": 1000}
    ]
    pa.Table.from_pylist(videos, schema=records.VIDEO_SCHEMA)


def test_provenance_of_a_column_is_replaced_not_repeated():
    table = flow(("a",))
    stage = Caption(Caption.Config())
    table = apply_stage(stage, table, stage.process)
    assert [e["model"] for e in table["provenance"].to_pylist()[0]] == ["upper"]


class Broken(Stage):
    name = "broken"
    inputs = ()
    outputs = pa.schema([("n", pa.int64())])

    def __init__(self, answer):
        super().__init__(self.Config())
        self.answer = answer

    def process(self, batch):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "0 outcomes for 1 rows"),
        ([{"n": 1}], "dict for /a, expected Kept or Drop"),
        ([Kept(())], "without any row"),
        ([Kept(({"m": 1},))], "does not declare: m"),
        ([Kept(({"n": "one"},))], "wrote n not as int64"),
    ],
)
def test_a_stage_that_breaks_the_contract_is_named(answer, said):
    table = source_table(
        [
            {
                "source": "/a",
                "source_version": "",
                "file_bytes": 1,
                "attempts": 0,
                "refusal": None,
                "spans": None,
            }
        ]
    )
    stage = Broken(answer)
    with pytest.raises(StageError, match="Stage broken") as error:
        apply_stage(stage, table, stage.process)
    assert said in str(error.value)


def test_a_column_keeps_its_old_value_where_a_row_does_not_mention_it():
    class Twice(Stage):
        name = "twice"
        inputs = ("clip_id",)
        outputs = pa.schema([("caption", pa.string())])

        def process(self, batch):
            return [Kept(({"caption": "new"} if i == 0 else {},)) for i, _ in enumerate(batch)]

    stage = Twice(Twice.Config())
    table = apply_stage(stage, flow(("aa",)), stage.process)
    assert table["caption"].to_pylist() == ["new", "AA_1000_2000"]
