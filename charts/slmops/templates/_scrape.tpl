{{/* The scrape jobs of the bundled Prometheus, and what to copy into one's own (docs/metrics.md): pods of ours that
have a port named metrics, with the labels that rollout analysis asks for. The operator's metrics name the namespace of
the object that they speak of: theirs is kept. */}}
{{- define "slmops.scrape" -}}
{{- $root := . }}
{{- range $what, $label := dict "objects" "managed_by" "operator" "part_of" }}
- job_name: slmops-{{ $what }}
  honor_labels: {{ eq $what "operator" }}
  kubernetes_sd_configs:
    - role: pod
      {{- if $root.Values.watchNamespaces }}
      namespaces: {names: {{ toJson (uniq (append $root.Values.watchNamespaces $root.Release.Namespace)) }}}
      {{- end }}
  relabel_configs:
    - {source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_{{ $label }}], regex: slmops, action: keep}
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
{{- end }}

{{- define "slmops.prometheusConfig" -}}
global:
  scrape_interval: {{ .Values.prometheus.bundled.scrapeInterval }}
scrape_configs:
  {{- include "slmops.scrape" . | nindent 2 }}
{{- end }}
