import os
import site
import sys
import traceback
import warnings
import zipfile
from pathlib import Path

import pytest

from trl_core import discovery
from trl_core.algorithm import Algorithm
from trl_core.discovery import find, list_algorithms, load, unknown_groups
from trl_core.errors import (
    AlgorithmNotFoundError,
    AmbiguousAlgorithmError,
    BrokenAlgorithmError,
    TRLCoreError,
)
from trl_core.stability import Stability

from .helpers_dist import algorithm_source, imported, write_distribution, write_plugin


def listed(distribution):
    return [info for info in list_algorithms() if info.distribution == distribution]


def broken(name):
    (info,) = [info for info in list_algorithms() if info.name == name]
    return info.broken


# -- listing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tag", ["stable", "experimental", "deprecated"])
def test_group_is_the_tag(packages, tag):
    write_plugin(packages, "zeta", tag=tag)
    assert find("zeta").stability is Stability(tag)


def test_info_holds_what_the_metadata_says(packages):
    write_plugin(packages, "zeta", version="1.4")
    info = find("zeta")
    assert (info.name, info.distribution, info.version, info.value) == ("zeta", "trl-zeta", "1.4", "trl_zeta:algorithm")
    assert info.qualified == "trl-zeta:zeta"
    assert info.broken is None


def test_list_imports_no_plugin(packages):
    write_plugin(packages, "zeta")
    write_distribution(
        packages,
        "trl-eta",
        {"trl_core.stable": {"eta": "trl_eta.inner.algo:algorithm"}},
        files={
            "trl_eta/__init__.py": "",
            "trl_eta/inner/__init__.py": "",
            "trl_eta/inner/algo.py": algorithm_source("eta"),
        },
    )
    assert [info.summary for info in listed("trl-eta") + listed("trl-zeta")] == ["Read from the source."] * 2
    assert imported(packages) == []


def test_load_leaves_the_trace_that_listing_must_not(packages):
    write_plugin(packages, "zeta")
    load("zeta")
    assert imported(packages) == ["trl_zeta"]


def test_list_is_sorted_by_name_then_distribution(packages):
    write_plugin(packages, "zzb", distribution="trl-one")
    write_plugin(packages, "zza", distribution="trl-two")
    write_plugin(packages, "zzb", distribution="trl-another")
    found = [info.qualified for info in list_algorithms() if info.name.startswith("zz")]
    assert found == ["trl-two:zza", "trl-another:zzb", "trl-one:zzb"]


def test_list_holds_the_algorithms_of_the_core():
    assert find("grpo").qualified == "trl-core:grpo"


def test_list_sees_a_distribution_installed_after_the_last_call(packages):
    assert listed("trl-zeta") == []
    before = packages.stat()
    write_plugin(packages, "zeta")
    # As on a file system with coarse time stamps, where the folder looks unchanged.
    os.utime(packages, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [info.broken for info in listed("trl-zeta")] == [None]


def test_distribution_found_twice_is_listed_once(packages, tmp_path):
    write_plugin(packages, "zeta", version="2.0")
    write_plugin(tmp_path / "later", "zeta", version="1.0")
    sys.path.append(str(tmp_path / "later"))
    assert [info.version for info in listed("trl-zeta")] == ["2.0"]


def test_folder_on_the_path_twice_is_listed_once(packages):
    write_plugin(packages, "zeta")
    sys.path.append(str(packages))
    assert len(listed("trl-zeta")) == 1


def test_first_copy_counts_even_if_it_registers_nothing(packages, tmp_path):
    write_distribution(packages, "trl-zeta", {"console_scripts": {"zeta": "trl_zeta:main"}}, version="2.0")
    write_plugin(tmp_path / "later", "zeta", version="1.0")
    sys.path.append(str(tmp_path / "later"))
    assert listed("trl-zeta") == []


def test_distribution_names_are_normalised(packages):
    write_distribution(
        packages,
        "TRL_Zeta.Plus",
        {"trl_core.stable": {"zeta": "trl_zeta:algorithm"}},
        files={"trl_zeta.py": algorithm_source("zeta")},
    )
    assert find("zeta").qualified == "trl-zeta-plus:zeta"
    assert find("Trl.ZETA_plus:zeta") == find("zeta")


def test_core_that_is_not_installed_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setattr(discovery, "CORE", "trl-core-absent")
    with pytest.raises(TRLCoreError, match="pip install -e"):
        list_algorithms()


def test_names_keep_their_capitals(packages):
    write_plugin(packages, "ZetaPlus", distribution="trl-zeta")
    assert [info.name for info in listed("trl-zeta")] == ["ZetaPlus"]


def test_group_written_twice_is_read_like_one(packages):
    info = write_plugin(packages, "zeta").with_name("trl_zeta-1.0.dist-info")
    with (info / "entry_points.txt").open("a") as entry_points:
        entry_points.write("[trl_core.experimental]\neta = trl_zeta:other\n")
    assert [info.name for info in listed("trl-zeta")] == ["eta", "zeta"]


# -- damaged distributions --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "damage",
    [
        lambda info: (info / "METADATA").unlink(),
        lambda info: (info / "METADATA").write_text("Version: 1.0\n"),
        lambda info: (info / "METADATA").write_bytes(b"Name: \xff\xfe\x00"),
        lambda info: (info / "entry_points.txt").write_bytes(b"[trl_core.stable]\n\xff\xfe = x"),
        lambda info: (info / "entry_points.txt").write_text("[trl_core.stable\nno equals sign\n"),
    ],
    ids=["no METADATA", "no Name", "METADATA not UTF-8", "entry points not UTF-8", "entry points without form"],
)
def test_damaged_distribution_is_skipped_and_hides_no_other(packages, damage):
    damage(write_distribution(packages, "trl-damaged", {"trl_core.stable": {"damaged": "trl_damaged:algorithm"}}))
    write_plugin(packages, "zeta")
    assert listed("trl-damaged") == []
    assert len(listed("trl-zeta")) == 1
    assert load("zeta").name == "zeta"


def test_left_over_of_another_version_does_not_hide_the_distribution(packages):
    write_plugin(packages, "zeta", version="2.0")
    (packages / "trl_zeta-1.0.dist-info").mkdir()
    (packages / "trl_zeta-1.0.dist-info" / "entry_points.txt").write_text("[trl_core.stable]\nzeta = trl_zeta:old\n")
    assert [info.version for info in listed("trl-zeta")] == ["2.0"]


def test_distribution_without_a_version_is_listed(packages):
    info = write_distribution(packages, "trl-zeta", {"trl_core.stable": {"zeta": "trl_zeta:algorithm"}})
    (info / "METADATA").write_text("Name: trl-zeta\n")
    assert [info.version for info in listed("trl-zeta")] == ["unknown"]


# -- broken, seen without import --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("requirement", "excluded"),
    [
        ("trl-core>=0.1", False),
        ("trl-core", False),
        ("trl-core<0.2", False),
        ("trl-core>=99", True),
        ("trl_core >=99", True),
        ("TRL.Core[peft] (<0.0.1)", True),
        ("trl-core>=99; python_version < '3'", False),
        ("trl-core>=99; extra == 'dev'", False),
        ("trl-core>=99; python_version >= '3'", True),
        ("trl-core-extras>=99", False),
        ("some nonsense ]]", False),
        ("trl-core>=99; nonsense ==", True),
    ],
)
def test_range_that_excludes_the_core_is_listed_as_broken(packages, requirement, excluded):
    write_plugin(packages, "zeta", requires=["numpy", requirement])
    assert (broken("zeta") is not None) is excluded


def test_range_reason_names_the_range_and_the_installed_version(packages):
    write_plugin(packages, "zeta", requires=["trl-core>=99"])
    assert broken("zeta") == f"it requires trl-core>=99, and trl-core {discovery.core_version()} is installed"


def test_range_accepts_a_pre_release_of_the_core(packages):
    write_distribution(packages, "trl-core", {}, version="0.7.0rc1")
    write_plugin(packages, "zeta", requires=["trl-core>=0.6,<0.8"])
    assert discovery.core_version() == "0.7.0rc1"
    assert broken("zeta") is None


@pytest.mark.parametrize("value", ["trl-zeta:algorithm", "trl_zeta", "trl_zeta:", "trl_zeta..x:algorithm", "", "a b:c"])
def test_bad_entry_point_value_is_listed_as_broken(packages, value):
    write_distribution(packages, "trl-zeta", {"trl_core.stable": {"zeta": value}}, files={"trl_zeta.py": ""})
    assert "'module:object'" in broken("zeta")


def test_missing_module_is_listed_as_broken(packages):
    write_distribution(packages, "trl-zeta", {"trl_core.stable": {"zeta": "trl_zteta:algorithm"}})
    assert broken("zeta") == "its module 'trl_zteta' is not found"


@pytest.mark.parametrize("name", ["ze+ta", "ze:ta", "ze ta"])
def test_name_that_cannot_be_spelt_in_a_composition_is_listed_as_broken(packages, name):
    write_plugin(packages, name, distribution="trl-zeta")
    assert f"{name!r}" in broken(name)


def test_broken_algorithm_keeps_its_summary(packages):
    write_plugin(packages, "zeta", requires=["trl-core>=99"])
    assert find("zeta").summary == "Read from the source."


# -- summary and extends without import -------------------------------------------------------------------------------
CALL = "Algorithm(name='zeta', summary='Literal.', extends='grpo')"
IMPORT = "from trl_core import Algorithm\n"


@pytest.mark.parametrize(
    "files",
    [
        {"trl_zeta.py": IMPORT + f"algorithm = {CALL}"},
        {"trl_zeta.py": IMPORT + f"algorithm: Algorithm = {CALL}"},
        {"trl_zeta.py": IMPORT + "algorithm = Algorithm('zeta', 'Literal.', 'grpo')"},
        {"trl_zeta.py": IMPORT + "algorithm = Algorithm('zeta', 'Literal.', extends='grpo')"},
        {"trl_zeta.py": IMPORT + "algorithm = Algorithm(name='zeta', summary='Lit' 'eral.', extends='grpo')"},
        {"trl_zeta.py": f"import trl_core\nalgorithm = trl_core.{CALL}"},
        {
            "trl_zeta.py": IMPORT
            + f"other = Algorithm('other', 'Other.')\nalgorithm = {CALL}\nlast = Algorithm('x', 'y')"
        },
        {"trl_zeta.py": IMPORT + f"algorithm = None\nalgorithm = {CALL}"},
        {"trl_zeta/__init__.py": IMPORT + f"algorithm = {CALL}"},
        {"trl_zeta/__init__.py": "from .a import algorithm", "trl_zeta/a.py": f"algorithm = {CALL}"},
        {"trl_zeta/__init__.py": "from trl_zeta.a import z as algorithm", "trl_zeta/a.py": f"z = {CALL}"},
        {
            "trl_zeta/__init__.py": "from .a import algorithm",
            "trl_zeta/a/__init__.py": "from .b import algorithm",
            "trl_zeta/a/b.py": "from ..c import z as algorithm",
            "trl_zeta/c.py": f"z = {CALL}",
        },
        {
            "trl_zeta/__init__.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from .a import algorithm\n"
                "def __getattr__(name):\n    raise AttributeError(name)"
            ),
            "trl_zeta/a.py": f"algorithm = {CALL}",
        },
    ],
    ids=[
        "assignment",
        "annotated",
        "positional",
        "partly positional",
        "joined strings",
        "qualified call",
        "among others",
        "last assignment counts",
        "package",
        "relative re-export",
        "absolute re-export under another name",
        "three re-exports",
        "lazy module",
    ],
)
def test_literals_are_read_from_the_source(packages, files):
    write_distribution(packages, "trl-zeta", {"trl_core.stable": {"zeta": "trl_zeta:algorithm"}}, files=files)
    info = find("zeta")
    assert (info.summary, info.extends) == ("Literal.", "grpo")
    assert imported(packages) == []


@pytest.mark.parametrize(
    "source",
    [
        "def __getattr__(name):\n    return 1",
        "from .a import algorithm",
        "from .trl_zeta import algorithm",
        "from trl_zeta import algorithm",
        "from absent_package import algorithm",
        "from trl_core import *",
        "algorithm = make('zeta', 'No summary.', 'grpo')",
        "algorithm = other",
        "def algorithm(): ...",
        "this is no Python",
        "algorithm = Algorithm(**{'summary': 'no literal'})",
        "S = 'no literal'\nalgorithm = Algorithm(name='zeta', summary=S)",
        "(" * 500 + ")" * 500,
        "",
    ],
)
def test_odd_source_falls_back_to_the_metadata(packages, source):
    write_plugin(packages, "zeta", source=source)
    info = find("zeta")
    assert (info.summary, info.extends, info.broken) == ("Read from the metadata.", None, None)


def test_summary_over_several_lines_becomes_one(packages):
    write_plugin(packages, "zeta", source=algorithm_source("zeta", summary="Two\n    lines.\n"))
    assert find("zeta").summary == "Two lines."


def test_thirteenth_name_on_the_way_falls_back_to_the_metadata(packages):
    files = {f"trl_zeta/m{i}.py": f"from .m{i + 1} import algorithm" for i in range(12)}
    files |= {"trl_zeta/__init__.py": "", "trl_zeta/m12.py": f"algorithm = {CALL}"}
    points = {"zeta": "trl_zeta.m0:algorithm", "eta": "trl_zeta.m1:algorithm"}
    write_distribution(packages, "trl-zeta", {"trl_core.stable": points}, files=files)
    assert (find("zeta").extends, find("eta").extends) == (None, "grpo")


def test_source_in_another_encoding_is_read_as_python_reads_it(packages):
    path = write_plugin(packages, "zeta")
    path.write_bytes("# coding: latin-1\nalgorithm = Algorithm(summary='Größe')".encode("latin-1"))
    assert find("zeta").summary == "Größe"


def test_source_that_cannot_be_decoded_falls_back_to_the_metadata(packages):
    write_plugin(packages, "zeta").write_bytes(b"algorithm = Algorithm(summary='\xff')")
    assert find("zeta").summary == "Read from the metadata."


def test_reading_the_source_gives_no_warning_of_its_own(packages, recwarn):
    warnings.simplefilter("always")
    write_plugin(packages, "zeta", source=r"pattern = '\d'" + f"\nalgorithm = {CALL}")
    assert find("zeta").extends == "grpo"
    assert len(recwarn) == 0


def test_namespace_package_is_read_without_import(packages):
    write_distribution(
        packages,
        "trl-zeta",
        {"trl_core.stable": {"zeta": "zeta_space.inner:algorithm"}},
        files={"zeta_space/inner/__init__.py": f"algorithm = {CALL}"},
    )
    assert find("zeta").extends == "grpo"


def test_zip_on_the_path_is_listed_and_read(packages, tmp_path):
    write_plugin(packages, "zeta")
    archive = tmp_path / "plugin.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in packages.rglob("*"):
            target.write(path, path.relative_to(packages))
    sys.path[0] = str(archive)
    assert [(info.extends, info.broken) for info in listed("trl-zeta")] == [("grpo", None)]


def test_editable_install_by_path_file_is_read(packages, tmp_path):
    write_plugin(packages, "zeta").rename(tmp_path / "trl_zeta.py")
    (packages / "_trl_zeta.pth").write_text(f"{tmp_path}\n")
    site.addsitedir(str(packages))
    assert (find("zeta").extends, find("zeta").broken) == ("grpo", None)


def test_editable_install_by_import_finder_is_read(packages, tmp_path):
    source = tmp_path / "checkout" / "src" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("from .algo import algorithm")
    source.with_name("algo.py").write_text(f"algorithm = {CALL}")
    # What setuptools writes for an editable install, in short: a finder that maps a package to a folder.
    finder = (
        "import sys\nfrom importlib.util import spec_from_file_location\n"
        "class Finder:\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        if name == 'trl_zeta': return spec_from_file_location(name, {str(source)!r})\n"
        "def install(): sys.meta_path.append(Finder)\n"
    )
    points = {"trl_core.stable": {"zeta": "trl_zeta:algorithm"}}
    write_distribution(packages, "trl-zeta", points, files={"__editable___trl_zeta_finder.py": finder})
    (packages / "__editable__.trl_zeta.pth").write_text(
        "import __editable___trl_zeta_finder; __editable___trl_zeta_finder.install()\n"
    )
    site.addsitedir(str(packages))
    assert (find("zeta").extends, find("zeta").broken) == ("grpo", None)
    assert "trl_zeta" not in sys.modules


# -- unknown groups ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("group", "suggestion"),
    [
        ("trl_core.experimntal", "trl_core.experimental"),
        ("trl_core.Stable", "trl_core.stable"),
        ("trl-core.stable", "trl_core.stable"),
        ("trl_core.zzz", None),
        ("trl_core", None),
    ],
)
def test_unknown_group_is_reported_with_distribution_and_suggestion(packages, group, suggestion):
    write_distribution(packages, "trl-zeta", {group: {"zeta": "trl_zeta:algorithm"}})
    (unknown,) = [unknown for unknown in unknown_groups() if unknown.distribution == "trl-zeta"]
    assert (unknown.group, unknown.names, unknown.suggestion) == (group, ("zeta",), suggestion)
    for part in ("trl-zeta", "zeta", group, suggestion or "trl_core.experimental"):
        assert part in str(unknown)


def test_known_and_foreign_groups_are_not_reported(packages):
    groups = ("trl_core.stable", "console_scripts", "trl_corelike.stable", "trl_core_extras.things", "trl.core")
    write_distribution(packages, "trl-zeta", {group: {"zeta": "trl_zeta:algorithm"} for group in groups})
    assert [unknown for unknown in unknown_groups() if unknown.distribution == "trl-zeta"] == []


# -- find -------------------------------------------------------------------------------------------------------------
def test_unknown_name_suggests_the_nearest(packages):
    write_plugin(packages, "zetafoo")
    with pytest.raises(AlgorithmNotFoundError, match=r"'zetafo'.*Did you mean 'zetafoo'\?(?s:.)*trl-core list"):
        find("zetafo")


def test_unknown_qualified_name_suggests_a_qualified_one(packages):
    write_plugin(packages, "zetafoo")
    with pytest.raises(AlgorithmNotFoundError, match=r"Did you mean 'trl-zetafoo:zetafoo'\?"):
        find("trl-zetafo:zetafoo")


def test_unknown_name_in_capitals_suggests_the_name(packages):
    write_plugin(packages, "zeta")
    with pytest.raises(AlgorithmNotFoundError, match=r"Did you mean 'zeta'\?"):
        find("ZETA")


def test_unknown_name_without_a_near_one_suggests_nothing():
    with pytest.raises(AlgorithmNotFoundError) as caught:
        find("qqqqqqqq")
    assert "Did you mean" not in str(caught.value)


def test_unknown_name_that_a_misspelt_group_registers_says_so(packages):
    write_distribution(packages, "trl-zeta", {"trl_core.experimntal": {"zeta": "trl_zeta:algorithm"}})
    with pytest.raises(AlgorithmNotFoundError, match=r"trl-zeta registers zeta in the unknown group"):
        find("zeta")


@pytest.fixture
def two_with_one_name(packages):
    write_plugin(packages, "zeta", distribution="trl-one")
    write_plugin(packages, "zeta", distribution="trl-two")
    return packages


def test_two_distributions_with_one_name_are_both_listed(two_with_one_name):
    assert [info.qualified for info in list_algorithms() if info.name == "zeta"] == ["trl-one:zeta", "trl-two:zeta"]


def test_name_of_two_distributions_is_ambiguous_and_gives_both_spellings(two_with_one_name):
    with pytest.raises(AmbiguousAlgorithmError, match=r"Write 'trl-one:zeta' or 'trl-two:zeta'"):
        find("zeta")


def test_qualified_name_chooses_among_two_distributions(two_with_one_name):
    load("trl-two:zeta")
    assert imported(two_with_one_name) == ["trl_two"]


@pytest.mark.parametrize("spelling", ["zeta", "trl-zeta:zeta"])
def test_name_in_two_groups_of_one_distribution_is_an_error_with_a_mend(packages, spelling):
    point = {"zeta": "trl_zeta:algorithm"}
    write_distribution(packages, "trl-zeta", {"trl_core.stable": point, "trl_core.experimental": point})
    with pytest.raises(
        AmbiguousAlgorithmError, match=r"trl_core\.experimental and trl_core\.stable(?s:.)*Keep one of the lines"
    ):
        find(spelling)


# -- load -------------------------------------------------------------------------------------------------------------
def test_load_returns_the_exported_algorithm(packages):
    write_plugin(packages, "zeta")
    algorithm = load("zeta")
    assert isinstance(algorithm, Algorithm)
    assert algorithm is sys.modules["trl_zeta"].algorithm


def test_load_accepts_a_record(packages):
    write_plugin(packages, "zeta")
    assert load(find("zeta")) is load("zeta")


def test_load_follows_a_dotted_object(packages):
    source = "class Namespace:\n    from trl_core.algorithm import Algorithm\n    a = Algorithm('zeta', 'x')\n"
    point = {"zeta": "trl_zeta:Namespace.a"}
    write_distribution(packages, "trl-zeta", {"trl_core.stable": point}, files={"trl_zeta.py": source})
    assert load("zeta").name == "zeta"


def refusal(name):
    with pytest.raises(BrokenAlgorithmError) as caught:
        load(name)
    for part in ("'zeta'", "trl-zeta", "1.0", "trl_zeta:algorithm"):
        assert part in str(caught.value)
    return caught.value


def test_load_refuses_an_excluded_core_before_import(packages):
    write_plugin(packages, "zeta", requires=["trl-core>=99"])
    assert "requires trl-core>=99" in str(refusal("zeta"))
    assert imported(packages) == []


def test_load_of_a_plugin_that_raises_chains_the_original(packages):
    path = write_plugin(packages, "zeta", source="def boom():\n    raise KeyError('from the plugin')\nboom()\n")
    error = refusal("zeta")
    assert "KeyError: 'from the plugin'" in str(error)
    assert isinstance(error.__cause__, KeyError)
    assert Path(traceback.extract_tb(error.__cause__.__traceback__)[-1].filename) == path


def test_load_of_a_plugin_with_a_syntax_error_names_the_line(packages):
    write_plugin(packages, "zeta", source="algorithm = = 1\n")
    assert "trl_zeta.py, line 3" in str(refusal("zeta"))


def test_load_of_a_plugin_that_exits_is_refused(packages):
    write_plugin(packages, "zeta", source="raise SystemExit('goodbye')")
    assert "SystemExit: goodbye" in str(refusal("zeta"))


def test_load_without_a_dependency_says_to_install_it(packages):
    write_plugin(packages, "zeta", source="import absent_package.inner")
    assert "pip install absent_package" in refusal("zeta").mend


@pytest.mark.parametrize("missing", ["trl_zeta.absent", "trl_core.absent"])
def test_load_without_a_module_of_the_plugin_or_core_does_not_say_to_install_it(packages, missing):
    write_plugin(packages, "zeta", source=f"import {missing}")
    mend = refusal("zeta").mend
    assert "pip install" not in mend
    assert "trl-zeta" in mend


def test_load_without_the_exported_object_is_refused(packages):
    write_plugin(packages, "zeta", source="algorithms = 1")
    assert "no attribute 'algorithm'" in str(refusal("zeta"))


@pytest.mark.parametrize(
    ("source", "kind"), [("algorithm = {}", "dict"), ("class algorithm: ...", "type"), ("algorithm = None", "NoneType")]
)
def test_load_of_a_wrong_object_names_its_type(packages, source, kind):
    write_plugin(packages, "zeta", source=source)
    assert f"type '{kind}'" in str(refusal("zeta"))


def test_load_of_an_algorithm_with_another_name_is_refused(packages):
    write_plugin(packages, "zeta", source=algorithm_source("theta"))
    assert "'theta'" in str(refusal("zeta"))


def test_broken_plugins_break_neither_the_listing_nor_another_plugin(packages):
    write_plugin(packages, "zeta-raises", source="raise RuntimeError")
    write_plugin(packages, "zeta-syntax", source="= =")
    write_plugin(packages, "zeta-excluded", requires=["trl-core>=99"])
    write_distribution(packages, "trl-zeta-value", {"trl_core.stable": {"zeta-value": "no value!"}})
    write_plugin(packages, "zeta")
    names = [info.name for info in list_algorithms() if info.name.startswith("zeta")]
    assert names == ["zeta", "zeta-excluded", "zeta-raises", "zeta-syntax", "zeta-value"]
    assert load("zeta").name == "zeta"


def test_load_gives_no_stability_warning(packages, recwarn):
    write_plugin(packages, "zeta", tag="deprecated")
    load("zeta")
    assert len(recwarn) == 0
