"""What a model's outputs mean: the classes of a run, and the data that is matched with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from coco_data import config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fpn_plugin.data import DatasetError, check_config_datasets, register_coco_format, register_own
from fpn_plugin.data.checks import training_classes
from fpn_plugin.data.classes import adopt_classes, check_test_classes

pytestmark = pytest.mark.usefixtures("registry")
Write = Callable[..., "tuple[str, str]"]

SWAPPED = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
RENAMED = [{"id": 1, "name": "cat"}, {"id": 2, "name": "hound"}]
FEWER = [{"id": 1, "name": "cat"}]
OTHER_IDS = [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}]


def own(train: tuple[str, str] = ("", ""), val: tuple[str, str] = ("", "")) -> CfgNode:
    keys = ("TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    return config(classes=80, **dict(zip(keys, (*train, *val))))


def with_classes(cfg: CfgNode, *names: str) -> CfgNode:
    cfg.DATASETS.CLASSES.NAMES, cfg.DATASETS.CLASSES.IDS = list(names), list(range(len(names)))
    return cfg


def other_categories(sound: Any, categories: Any) -> Any:
    for i, annotation in enumerate(sound["annotations"]):
        annotation["category_id"] = categories[i % len(categories)]["id"]
    return {**sound, "categories": categories}


def register_dicts(name: str, *annotations: dict[str, Any], **metadata: Any) -> None:
    """A dataset as Detectron2's tutorial has it: a function that gives dicts."""
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    objects = [{key: x for key, x in {**box, **a}.items() if x is not None} for a in annotations]
    record = {"file_name": "a.jpg", "image_id": 1, "width": 64, "height": 48}
    DatasetCatalog.register(name, lambda: [{**record, "annotations": objects}])
    MetadataCatalog.get(name).set(**metadata)


def test_training_data_fills_in_the_classes_whatever_stood_there(
    sound: Any, write: Write, caplog: Any
) -> None:
    content = other_categories(sound, [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}])
    cfg = register_own(with_classes(own(write(content)), "tree", "bush"))
    assert cfg.DATASETS.CLASSES == {"NAMES": ["cat", "dog"], "IDS": [5, 9]}
    assert "DATASETS.CLASSES: the config's classes (" in caplog.text
    assert "2: tree, bush" in caplog.text and "own.json has 2: cat, dog" in caplog.text
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


@pytest.mark.parametrize("check", ["auto", "off"])
def test_classes_of_registered_training_data(check: str, sound: Any, write: Write) -> None:
    register_coco_format("t", *write(other_categories(sound, OTHER_IDS)))
    register_dicts("dicts", {}, thing_classes=("cat", "dog"))
    for names, ids in ((("t", "dicts"), (5, 9)), (("dicts", "t"), (0, 1))):
        cfg = config(names, ())
        cfg.DATASETS.CHECK = check
        classes = training_classes(cfg, check_config_datasets(cfg))
        assert classes is not None and (classes.names, classes.ids) == (("cat", "dog"), ids)


@pytest.mark.parametrize(
    "categories, difference",
    [
        (SWAPPED, "class 0 is 'cat' in the model and 'dog' in v"),
        (RENAMED, "class 1 is 'dog' in the model and 'hound' in v"),
        (FEWER, "class 1 is 'dog' in the model and no class in v"),
        (OTHER_IDS, ""),
    ],
)
@pytest.mark.parametrize("is_json", [True, False])
def test_a_test_set_has_the_classes_of_the_model(
    categories: Any, difference: str, is_json: bool, sound: Any, write: Write
) -> None:
    names = [category["name"] for category in categories]
    if is_json:
        register_coco_format("v", *write(other_categories(sound, categories)))
    else:
        register_dicts("v", {}, thing_classes=names)
    cfg = with_classes(config((), ("v",)), "cat", "dog")
    if not difference:
        check_config_datasets(cfg)
        DatasetCatalog.get("v")
        return check_test_classes(cfg, "v")
    lists = rf"(?s){difference}:.*NAMES has 2: cat, dog\n.*has {len(names)}: {', '.join(names)}\n"
    with pytest.raises(ValueError, match=lists):
        check_config_datasets(cfg)
    DatasetCatalog.get("v")
    with pytest.raises(ValueError, match=lists):  # as an evaluation by hand does
        check_test_classes(cfg, "v")
    cfg.DATASETS.CHECK = "off"
    check_config_datasets(cfg)
    check_test_classes(cfg, "v")


@pytest.mark.parametrize("known", [(), ("cat", "dog"), ("tree", "bush")])
def test_a_checkpoint_knows_its_classes(known: tuple[str, ...], tmp_path: Path) -> None:
    record = {"DATASETS": {"CLASSES": {"NAMES": ["cat", "dog"], "IDS": [1, 2]}}}
    file, old = str(tmp_path / "model.pth"), str(tmp_path / "old.pth")
    torch.save({"model": {}, "fpn_plugin": {"config": record}}, file)
    torch.save({"model": {}, "fpn_plugin": {"config": {"DATASETS": ["CLASSES"]}}}, old)
    cfg = with_classes(config(), *known)
    for path in (old, "detectron2://a.pkl", "gone.pth", ""):
        adopt_classes(cfg, path)
        assert tuple(cfg.DATASETS.CLASSES.NAMES) == known
    adopt_classes(cfg, file)
    assert cfg.DATASETS.CLASSES.NAMES == ["cat", "dog"]


def test_a_trained_model_does_not_need_its_data(sound: Any, write: Write, tmp_path: Path) -> None:
    paths, val = write(sound), write(sound, "val.json")
    cfg = register_own(own(paths, paths))
    cfg.DATASETS.OWN.TRAIN_JSON, cfg.DATASETS.OWN.TRAIN_IMAGES = "gone.json", "gone"
    before = cfg.DATASETS.CLASSES.clone()
    cfg.DATASETS.OWN.VAL_JSON = "elsewhere.json"
    other = register_own(cfg.clone(), needed=())
    assert (other.DATASETS.TRAIN, other.DATASETS.TEST) == ((), ())
    with pytest.raises(ValueError, match="OWN.VAL_JSON is 'elsewhere.json', .*--val-json"):
        register_own(cfg.clone(), needed=("VAL",))
    with pytest.raises(ValueError, match="OWN.TRAIN_JSON is 'gone.json'"):
        register_own(cfg.clone())
    DatasetCatalog.remove("own_val")
    MetadataCatalog.remove("own_val")
    cfg.DATASETS.OWN.VAL_JSON = val[0]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80  # a shipped config's
    register_own(cfg, needed=("VAL",))
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((), ("own_val",))
    assert cfg.DATASETS.CLASSES == before and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    shutil.rmtree(val[1])
    with pytest.raises(ValueError, match="OWN.VAL_IMAGES is .* not a folder .*--val-images"):
        register_own(cfg, needed=("VAL",))


@pytest.mark.parametrize(
    "annotation, message",
    [
        ({"category_id": 2}, "a.jpg.*'category_id' is 2, .* 0 to 1.*thing_classes.*cat, dog"),
        ({"category_id": -1}, "'category_id' is -1, but must be from 0 to 1"),
        ({"category_id": "1"}, "'category_id' is '1', but must be"),
        ({"category_id": None}, "'category_id' is missing"),
        ({"bbox_mode": None}, "'bbox_mode' is missing"),
        ({"bbox": None}, "'bbox' is missing"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_dicts_that_do_not_fit_their_classes(
    annotation: dict[str, Any], message: str, training: bool
) -> None:
    register_dicts("mine", {}, annotation, thing_classes=["cat", "dog"])
    with pytest.raises(DatasetError, match=f"(?s)dataset mine: 1 error.*{message}"):
        check_config_datasets(config(*((("mine",), ()) if training else ((), ("mine",)))))


@pytest.mark.parametrize("count", [1, 3])
def test_number_of_classes_of_dicts(count: int) -> None:
    def load() -> list[Any]:  # names them when it is called, as load_coco_json does
        MetadataCatalog.get("late").set(thing_classes=["cat", "dog"])
        return []

    register_dicts("mine", {}, {"category_id": 1}, thing_classes=["cat", "dog"])
    DatasetCatalog.register("late", load)
    for name in ("mine", "late"):
        message = rf"ROI_HEADS.NUM_CLASSES is {count}, but dataset {name} .*thing_classes.* has 2 "
        with pytest.raises(ValueError, match=message):
            check_config_datasets(config((name,), classes=count))
        assert check_config_datasets(config((name,), classes=2))[0].classes == ("cat", "dog")


@pytest.mark.parametrize("architecture", ["PanopticFPN", "SemanticSegmentor", "GeneralizedRCNN"])
def test_number_of_stuff_classes(architecture: str) -> None:
    register_dicts("s", stuff_classes=["sky", "road", "grass"])
    cfg = config(("s",))
    cfg.MODEL.META_ARCHITECTURE = architecture
    if architecture != "GeneralizedRCNN":
        message = "SEM_SEG_HEAD.NUM_CLASSES is 54, .*dataset s .*has 3: sky, road, grass"
        with pytest.raises(ValueError, match=message):
            check_config_datasets(cfg)
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
        register_dicts("other", stuff_classes=["road", "sky", "grass"])
        cfg.DATASETS.TEST = ("other",)
        with pytest.raises(ValueError, match="class 0 is 'sky' in s and 'road' in other"):
            check_config_datasets(cfg)
    cfg.DATASETS.TEST = ("s",)
    check_config_datasets(cfg)
