{{/* The scrape job of the bundled Prometheus, and what to copy into one's own (docs/metrics.md): pods of ours that
have a port named metrics, with the labels that rollout analysis asks for. */}}
{{- define "slmops.scrape" -}}
- job_name: slmops
  kubernetes_sd_configs:
    - role: pod
      {{- if .Values.watchNamespaces }}
      namespaces: {names: {{ toJson (uniq (append .Values.watchNamespaces .Release.Namespace)) }}}
      {{- end }}
  relabel_configs:
    - {source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_managed_by, __meta_kubernetes_pod_label_app_kubernetes_io_part_of], separator: ;, regex: "slmops;.*|.*;slmops", action: keep}
    - {source_labels: [__meta_kubernetes_pod_container_port_name], regex: metrics, action: keep}
    - {source_labels: [__meta_kubernetes_pod_phase], regex: Pending|Succeeded|Failed, action: drop}
    - {source_labels: [__meta_kubernetes_namespace], target_label: namespace}
    - {source_labels: [__meta_kubernetes_pod_name], target_label: pod}
    - {source_labels: [__meta_kubernetes_pod_container_name], target_label: container}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_kind], target_label: slmops_kind}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_owner], target_label: slmops_owner}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_role], target_label: slmops_role}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_revision], target_label: slmops_revision}
{{- end }}

{{- define "slmops.prometheusConfig" -}}
global:
  scrape_interval: {{ .Values.prometheus.bundled.scrapeInterval }}
scrape_configs:
  {{- include "slmops.scrape" . | nindent 2 }}
{{- end }}
