"""GET /kernels, and the metrics `cutedsl_nvfp4_layers` and `cutedsl_nvfp4_self_check`: the kernel report over HTTP."""

from argparse import Namespace

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import Gauge
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

logger = init_logger(__name__)

REPORT_METHOD = "cutedsl_nvfp4_report"

_LAYERS = Gauge(
    "cutedsl_nvfp4_layers",
    "NVFP4 layers of the served model, by the kernel class that serves them",
    ["kernel", "ours"],
    multiprocess_mode="mostrecent",
)
_SELF_CHECK = Gauge(
    "cutedsl_nvfp4_self_check",
    "1 for the verdict of the self-check on this build's GPU kernels: passed, off, or nothing to check",
    ["verdict"],
    multiprocess_mode="mostrecent",
)


class KernelReportEndpoint:
    """vLLM endpoint plugin; VLLM_PLUGINS must name `cutedsl_nvfp4` for vLLM to load it."""

    name = "cutedsl_nvfp4"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        @app.get("/kernels")
        async def kernels(request: Request) -> JSONResponse:
            return JSONResponse(request.app.state.cutedsl_nvfp4_report)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Ask every rank once, before the server is ready; the selection does not change afterwards."""
        assert engine_client is not None, "the kernel report needs an engine"
        reports = await engine_client.collective_rpc(REPORT_METHOD)
        report = dict(reports[0], ranks=len(reports))
        differing = [rank for rank, other in enumerate(reports) if other["summary"] != report["summary"]]
        if differing:
            raise RuntimeError(
                f"ranks disagree on the kernels that serve: rank 0 has {report['summary']}, "
                f"rank {differing[0]} has {reports[differing[0]]['summary']}"
            )
        state.cutedsl_nvfp4_report = report
        for ours in (True, False):
            kernels = [row["kernel"] for row in report["layers"] if row["ours"] is ours]
            for kernel in set(kernels):
                _LAYERS.labels(kernel=kernel, ours=str(ours).lower()).set(kernels.count(kernel))
        _SELF_CHECK.labels(verdict=report["self_check"]["verdict"].partition(":")[0]).set(1)
        for row in report["layers"]:
            if not row["ours"]:
                logger.warning("%s is served by %s: %s", row["name"], row["kernel"], row["reason"])
        logger.info("NVFP4 layers by kernel: %s; activations: %s", report["summary"], report["activations"])
