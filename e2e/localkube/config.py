"""The text of every configuration file: pure functions from settings to content."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path

from localkube import paths

# Parts of containerd that need what this machine may lack, or that write outside our folders.
DISABLED = [
    "io.containerd.internal.v1.opt",
    *(f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")),
]


def kubeconfig(server: str, ca: bytes, cert: bytes, key: bytes) -> str:
    def encoded(data: bytes) -> str:
        return base64.b64encode(data).decode()

    name = paths.NODE
    return _json(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": {"server": server, "certificate-authority-data": encoded(ca)}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "users": [
                {"name": name, "user": {"client-certificate-data": encoded(cert), "client-key-data": encoded(key)}}
            ],
        }
    )


def containerd(pause_image: str, cni_config: Path) -> str:
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE no sandbox starts otherwise.
    # netns_mounts_under_state_dir: leftovers can be told from those of another containerd.
    return f"""\
version = 2
root = "{paths.CONTAINERD_ROOT}"
state = "{paths.CONTAINERD_STATE}"
disabled_plugins = {json.dumps(DISABLED)}

[grpc]
  address = "{paths.CONTAINERD_SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause_image}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{cni_config}"

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  BinaryName = "runc"
  Root = "{paths.RUN}/runc"
  SystemdCgroup = false
"""


def cni() -> str:
    bridge = {
        "type": "bridge",
        "bridge": paths.BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(paths.CNI_STATE),
            "ranges": [[{"subnet": paths.POD_CIDR, "gateway": paths.NODE_IP}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return _json({"cniVersion": "1.0.0", "name": "slmops", "plugins": [bridge]})


def kubelet(pki: Path) -> str:
    # The disk's size may be far more than what is free to use, so neither eviction nor image
    # collection may go by a share of it.
    return _json(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": paths.NODE_IP,
            "healthzBindAddress": "127.0.0.1",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki / "kubelet-server.crt"),
            "tlsPrivateKeyFile": str(pki / "kubelet-server.key"),
            "containerRuntimeEndpoint": f"unix://{paths.CONTAINERD_SOCKET}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{paths.CGROUP}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "podLogsDir": str(paths.POD_LOGS),
            "volumePluginDir": str(paths.KUBELET_ROOT / "volume-plugins"),
            "clusterDNS": [paths.DNS_SERVICE_IP],
            "clusterDomain": "cluster.local",
            "maxPods": 110,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "serializeImagePulls": False,
        }
    )


def kube_proxy(kubeconfig_path: Path, *, masquerade_all: bool) -> str:
    return _json(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(kubeconfig_path)},
            "mode": "iptables",
            "clusterCIDR": paths.POD_CIDR,
            "hostnameOverride": paths.NODE,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "nodePortAddresses": [f"{paths.NODE_IP}/32"],
            "iptables": {"masqueradeAll": masquerade_all, "syncPeriod": "30s", "minSyncPeriod": "100ms"},
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
    )


def corefile(kubeconfig_path: Path, resolv_conf: str) -> str:
    # Without a nameserver to ask, on a machine that is offline, CoreDNS would not start.
    forward = "forward . /etc/resolv.conf" if re.search(r"^\s*nameserver\s+\S", resolv_conf, re.MULTILINE) else ""
    return f"""\
.:{paths.DNS_PORT} {{
    bind {paths.NODE_IP}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig_path} {paths.NODE}
        pods insecure
        ttl 5
    }}
    {forward}
    cache 30 {{
        disable success cluster.local
        disable denial cluster.local
    }}
}}
"""


def flags(options: Mapping[str, str | Path | int]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _json(content: object) -> str:
    """JSON is YAML, and the standard library writes it."""
    return json.dumps(content, indent=2) + "\n"
